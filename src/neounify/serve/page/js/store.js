/** Values that survive a reload of the tab: sessionStorage. */

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
        // Storage may be disabled; then values are lost at a reload.
      }
    },
  };
}

export const apiKey = stored("neounify.key");
export const savedSettings = stored("neounify.settings");
