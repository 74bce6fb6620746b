"""Interactive views of the workbook, one module each; its chapter has a static picture beside each."""
