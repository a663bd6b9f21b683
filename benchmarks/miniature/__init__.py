"""The paper's evaluation in miniature: its claims, checked on what the sandbox's experiments found, and the page."""
