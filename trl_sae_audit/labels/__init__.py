"""Labels of features: fetched, made by a language model from contexts, and scored on contexts that it did not see."""
