"""Everything that knows TRL's trainers and the engines under them."""
