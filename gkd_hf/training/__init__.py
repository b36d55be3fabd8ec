"""Trainers of the stages, the recipe that describes a run, and the pipeline that chains its stages."""
