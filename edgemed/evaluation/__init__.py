"""How right an engine is: tasks, prompts, scoring, answer matching and paired statistics. An engine
is held against its source item by item.
"""
