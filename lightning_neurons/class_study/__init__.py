"""Class studies: importance by class, and networks of the neurons of a class."""
