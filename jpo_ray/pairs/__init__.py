"""Which items to compare: embedding of instructions, candidates by similarity, selection to a budget."""
