"""The machine as Linux shows it in /proc, /sys and /dev. No torch.

Every reader takes the folder that stands for `/`, so that tests can make one up. What cannot be
read is None and seldom an error: containers and sandboxes hide much of it.
"""
