"""A world with a closed-form optimum, and every algorithm put to it."""
