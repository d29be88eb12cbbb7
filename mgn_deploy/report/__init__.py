"""What people look at: the page of rank lists, figures of training and attention."""
