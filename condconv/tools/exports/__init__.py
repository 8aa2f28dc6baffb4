"""Networks written in the formats that people deploy, each file run and compared."""
