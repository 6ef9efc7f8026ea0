// The page of a running sweep: checks every two seconds for a new point, and reloads at the reader's position.
const here = "qexp-place";
try { history.scrollRestoration = "manual"; } catch (error) { console.debug(error); }
const kept = sessionStorage.getItem(here);
sessionStorage.removeItem(here);
const back = () => {
  const page = document.documentElement;
  if (window.qexp && page.dataset.ready !== "yes") return setTimeout(back, 100);
  return window.scrollTo({ top: Number(kept), behavior: "instant" });
};
if (kept !== null) back();
const busy = () => document.activeElement && document.activeElement.tagName === "INPUT" && document.activeElement.value !== "";
setInterval(async () => {
  try {
    const now = await (await fetch("version", { cache: "no-store" })).text();
    if (now === version || document.hidden || busy()) return;
    sessionStorage.setItem(here, String(window.scrollY));
    location.reload();
  } catch (error) {
    console.debug("the server has ended", error);
  }
}, 2000);
