// Runs before anything is shown, so that a chosen theme does not flash up late. Without a choice the system's theme holds.
try {
  const theme = JSON.parse(localStorage.getItem('pyllama.theme'))
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme
} catch {
  // No storage: the system's theme.
}
