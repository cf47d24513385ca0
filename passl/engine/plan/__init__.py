"""``passl-plan``: a configuration for a folder of images, a machine and a time budget, with a reason for each value.

budget (time as text) -> images (what is there) -> machine (where it is to run) -> designs (networks and views that
suit them) -> probing (short real runs) -> recipe (settings and reasons) -> document (YAML and table); planner.py goes
through them from top to bottom.
"""
