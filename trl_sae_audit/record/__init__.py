"""The run record: written while a run trains, read back afterwards."""
