"""Text: chat templates, prompts with placeholders, tokens and their positions. May import `bundle` and `pictures`."""
