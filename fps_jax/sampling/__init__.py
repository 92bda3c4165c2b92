"""From a prompt to a video: a request checked, noise levels, solvers, the compiled loop, the pipeline. Knows no command line."""
