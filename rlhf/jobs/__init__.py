"""Programs run as jobs: a few at a time, each resumed where it was cut off, none done twice."""
