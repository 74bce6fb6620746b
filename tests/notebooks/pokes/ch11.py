"""Chapter 11: the kernel that the toolbox's cell runs."""

POKES = {"NAME": ("rows", "merge")}
