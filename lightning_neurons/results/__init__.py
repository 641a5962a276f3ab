"""Results of measurements and studies, as frozen values."""
