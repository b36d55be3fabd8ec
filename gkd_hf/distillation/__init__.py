"""What is distilled and how: query-based soft distillation, masks, objectives."""
