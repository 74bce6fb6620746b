"""The answers: what each bug is, where it is, and what the tools say. A reader who hunts does not open this folder."""
