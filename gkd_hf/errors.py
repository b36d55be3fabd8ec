"""What a user can get wrong. Defined beside the models, because that folder alone travels to the Hub."""

from gkd_hf.models.errors import InputError, nearest

__all__ = ["InputError", "nearest"]
