"""Interactive views of the workbook, one module each; the chapters have static pictures of the same views."""
