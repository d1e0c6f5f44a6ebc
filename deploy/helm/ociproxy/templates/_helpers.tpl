{{- define "ociproxy.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "ociproxy.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "ociproxy.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "ociproxy.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "ociproxy.selector" -}}
app.kubernetes.io/name: {{ include "ociproxy.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ociproxy.labels" -}}
{{ include "ociproxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "ociproxy.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ociproxy.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "ociproxy.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "ociproxy.onNodes" -}}
{{- if eq .Values.kind "DaemonSet" }}true{{ end }}
{{- end }}

{{- define "ociproxy.host" -}}
{{- if include "ociproxy.onNodes" . }}127.0.0.1{{ else }}0.0.0.0{{ end }}
{{- end }}

{{- define "ociproxy.adminHost" -}}
{{- .Values.admin.host | default (include "ociproxy.host" .) }}
{{- end }}

{{- /* The config file: what the user gave, and what the chart sets. */ -}}
{{- define "ociproxy.config" -}}
{{- $given := .Values.config.serve | default dict }}
{{- range list "host" "port" "tls" "auth" "preload_images" }}
{{- if hasKey $given . }}
{{- fail (printf "config.serve.%s: the chart sets it; see port, admin, tls, users and preload in values.yaml" .) }}
{{- end }}
{{- end }}
{{- range list "host" "port" }}
{{- if hasKey ($given.admin | default dict) . }}
{{- fail (printf "config.serve.admin.%s: the chart sets it; see admin in values.yaml" .) }}
{{- end }}
{{- end }}
{{- if hasKey (.Values.config.store | default dict) "path" }}
{{- fail "config.store.path: the chart sets it; see persistence and hostPath in values.yaml" }}
{{- end }}
{{- range .Values.config.upstreams }}
{{- range concat (list .) (.endpoints | default list) }}
{{- if and (kindIs "map" .) (hasKey (.auth | default dict) "password") }}
{{- fail "config.upstreams: auth.password would be in a ConfigMap; see credentials in values.yaml, and password_file" }}
{{- end }}
{{- end }}
{{- end }}
{{- $serve := dict "host" (include "ociproxy.host" .) "port" (int .Values.port) }}
{{- if .Values.admin.enabled }}
{{- $_ := set $serve "admin" (dict "host" (include "ociproxy.adminHost" .) "port" (int .Values.admin.port)) }}
{{- end }}
{{- with .Values.tls }}
{{- if .existingSecret }}
{{- $tls := dict "cert" "/etc/ociproxy/tls/tls.crt" "key" "/etc/ociproxy/tls/tls.key" }}
{{- if .clientCa }}{{ $_ := set $tls "client_ca" (printf "/etc/ociproxy/tls/%s" .clientCa) }}{{ end }}
{{- $_ := set $serve "tls" $tls }}
{{- end }}
{{- end }}
{{- if .Values.users.existingSecret }}
{{- $_ := set $serve "auth" (dict "htpasswd" "/etc/ociproxy/users/htpasswd") }}
{{- end }}
{{- if .Values.preload }}
{{- $_ := set $serve "preload_images" "/etc/ociproxy/config/images.txt" }}
{{- end }}
{{- $set := dict "serve" $serve "store" (dict "path" "/var/lib/ociproxy") }}
{{- mergeOverwrite (deepCopy .Values.config) $set | toYaml }}
{{- end }}

{{- /* Of the main port: what opens many connections to the admin listener must not restart a mirror. */ -}}
{{- define "ociproxy.probe" -}}
{{- $host := ternary "127.0.0.1" "" (not (empty (include "ociproxy.onNodes" .root))) }}
{{- if and .root.Values.tls.existingSecret .root.Values.tls.clientCa -}}
tcpSocket: # the kubelet has no client certificate
  {{- if $host }}
  host: {{ $host }}
  {{- end }}
  port: registry
{{- else -}}
httpGet:
  {{- if $host }}
  host: {{ $host }}
  {{- end }}
  path: {{ .path }}
  port: registry
  {{- if .root.Values.tls.existingSecret }}
  scheme: HTTPS
  {{- end }}
{{- end }}
{{- end }}
