-- One prepared request, again and again; what was measured is printed as JSON.
local body = io.open(os.getenv("BODY"), "rb")
wrk.method = "POST"
wrk.body = body:read("*a")
body:close()
for name, value in os.getenv("HEADERS"):gmatch("([%w-]+)=([^;]+)") do
  wrk.headers[name] = value
end

done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "failures": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
