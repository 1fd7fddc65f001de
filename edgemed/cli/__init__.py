"""The command line: thin verbs that parse, call and print. One file holds the verbs of one
subject.
"""
