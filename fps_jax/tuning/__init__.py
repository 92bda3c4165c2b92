"""What is measured to choose settings: schedules by their error, configs of the kernel by their time, and plots of both."""
