"""The demo: two small models trained, sampled, scored and shown in one report."""
