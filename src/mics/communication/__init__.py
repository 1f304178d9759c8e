"""What a unit sends, how, and when."""
