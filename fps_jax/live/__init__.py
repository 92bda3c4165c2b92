"""Endless video in a browser while it is made: `fps-live`."""
