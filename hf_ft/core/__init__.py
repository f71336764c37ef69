"""The vocabulary of a strategy: options, plans, terms, contexts, states."""
