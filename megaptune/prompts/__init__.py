"""From a template and a record to slots, and from a prompt encoder to the table that slots point into."""
