"""Mean IoU, sliding-window prediction, and the report by domain."""
