-- One prepared request, again and again; what was measured is printed as JSON.
local body = io.open(os.getenv("BODY"), "rb")
wrk.method = "POST"
wrk.body = body:read("*a")
body:close()
for name, value in os.getenv("HEADERS"):gmatch("([%w-]+)=([^;]+)") do
  wrk.headers[name] = value
end

-- By status, for who asks: it costs wrk a call a response.
if os.getenv("CODES") then
  codes, threads = {}, {}
  setup = function(thread) table.insert(threads, thread) end
  init = function() codes = {} end
  response = function(status) codes[status] = (codes[status] or 0) + 1 end
end

done = function(summary, latency)
  if threads then
    local found = {}
    for _, thread in ipairs(threads) do
      for status, count in pairs(thread:get("codes")) do
        table.insert(found, string.format('"%d": %d', status, count))
      end
    end
    io.write("\n{" .. table.concat(found, ", ") .. "}")
  end
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "failures": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
