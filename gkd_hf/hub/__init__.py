"""To the Hub and from it: native export, model cards, pushing, serving."""
