"""Reading files that others wrote, and writing that survives a kill."""
