/** What outlives a reload of this tab, and nothing more: sessionStorage. */

function stored(name) {
  return {
    get() {
      try {
        return sessionStorage.getItem(name) ?? "";
      } catch {
        return "";
      }
    },
    set(value) {
      try {
        sessionStorage.setItem(name, value);
      } catch {
        // Storage may be switched off; then nothing outlives a reload.
      }
    },
  };
}

export const apiKey = stored("neounify.key");
export const savedSettings = stored("neounify.settings");
