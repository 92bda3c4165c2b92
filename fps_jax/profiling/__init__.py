"""Where the time of a run goes, by stage: measured, written down and drawn."""
