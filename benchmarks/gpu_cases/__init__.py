"""What `benchmarks.gpu` measures: each module's functions are run by `child` in a process of their own.

A function takes `toy` first (True: tiny, on a CPU, in interpret mode, times not measured) and yields a dict for each part of its
case, or returns one. What it yielded is kept, should it hang later.
"""
