"""What a user passes in `callbacks=[…]`."""
