"""All the words of the town, as tables of templates."""
