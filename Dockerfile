# `mgn-deploy serve` on a CPU: docs/how-to/serve.md says how to run it.
FROM python:3.12.8-slim-bookworm AS build
COPY . /source
WORKDIR /source
RUN sh docker/wheel.sh /wheels

FROM python:3.12.8-slim-bookworm
COPY --from=build /wheels /wheels
COPY docker/install.sh docker/healthcheck.py /opt/
RUN sh /opt/install.sh /wheels /opt/mgn-deploy cpu,serve
# Nothing is written at run time, and no user of this number needs to exist.
ENV PATH=/opt/mgn-deploy/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s CMD ["python", "/opt/healthcheck.py"]
ENTRYPOINT ["mgn-deploy"]
CMD ["serve", "--bundle", "/bundle", "--store", "/store", "--host", "0.0.0.0"]
