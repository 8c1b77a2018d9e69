"""The user's functions that judge answers, in each form and in processes; nothing trains here."""
