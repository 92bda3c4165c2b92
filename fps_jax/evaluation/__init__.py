"""What a setting does to a video: two samples side by side, and measures of their difference."""
