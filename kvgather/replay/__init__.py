"""The run in which the crash was met, replayed: one server, many clients, one shared prompt, one gather of three."""
