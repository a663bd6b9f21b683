"""What a run will take, by arithmetic: nothing is downloaded, no model is loaded, nothing starts."""
