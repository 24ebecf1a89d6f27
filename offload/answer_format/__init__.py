"""How a model writes its answers: thoughts, content and tool calls, as its chat template has taught it."""
