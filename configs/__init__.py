"""The configurations that ship, a folder for each family; `schema` reads them, and says what one may hold."""
