"""Programs on numbers: jaxprs evaluated by numpy, with nothing compiled."""
