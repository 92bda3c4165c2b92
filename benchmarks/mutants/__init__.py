"""Do the tests notice small faults?"""
