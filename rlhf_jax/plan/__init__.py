"""What a compiled program would do on chips that need not be there."""
