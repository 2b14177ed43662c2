"""Thousands of pictures, each answered once: a stream of them in, rows out.

inputs.py: names -> a lazy stream of items     runner.py: items -> rows, over scheduler.py
watch.py:  the same of a folder that fills     output.py: rows -> a file that survives a kill
"""
