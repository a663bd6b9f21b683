"""All that knows Ray: sessions and resources, data execution, training workers, vLLM actors."""
